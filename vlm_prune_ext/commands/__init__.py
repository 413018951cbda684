"""One module per `vlm-prune` command, imported when the command is named."""

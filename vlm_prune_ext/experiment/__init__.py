"""The experiment room: settings, grid, record, log, measuring and reports of every command."""

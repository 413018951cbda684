"""One file per method: its hyper-parameters and its pure rule. They never import each other."""

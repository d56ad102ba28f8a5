"""Starting the processes of a command, and ending them so that nothing is left."""

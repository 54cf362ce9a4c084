"""Where the rows of a dataset lie in a folder: filed under its name on the hub, or as its authors gave it out."""

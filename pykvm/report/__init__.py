"""Reports for people and programs.  They take plain values and touch no machine."""

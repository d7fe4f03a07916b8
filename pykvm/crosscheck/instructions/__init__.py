"""One instruction from one state, on several processors."""

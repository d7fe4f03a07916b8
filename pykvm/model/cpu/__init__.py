"""The processor: instruction semantics on capstone's decoding, segmentation, exceptions, the run loop."""

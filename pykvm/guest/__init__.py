"""Making guests: images, page tables, boot states, devices, the run loop and the workloads."""

"""Every op of the model beside other implementations of it: correctness first, then time, memory and share of the roofline."""

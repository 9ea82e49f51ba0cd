"""Speed and memory beside other implementations of the same thing; each module runs by itself or as `spade-t5 bench NAME`."""

"""`kd study`: a grid of runs from one cache, and the tables over them."""

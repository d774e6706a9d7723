"""Trainers of other libraries that make their steps by line search; each file needs its library."""

"""What a folder holds besides a model's code: the runtime of its machine, and the program that runs it."""

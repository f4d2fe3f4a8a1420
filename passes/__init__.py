"""The transformations, one file each, installed as `graphopt.passes`."""

if __name__ != "graphopt.passes":
    raise ImportError(f"import graphopt.passes, not {__name__}: a second copy of every pass would be made")

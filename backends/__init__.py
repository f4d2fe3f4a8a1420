"""The ways to run a model, one package each; found by name through `graphopt.backend`."""

if __name__ != "graphopt.backends":
    raise ImportError("import graphopt.backends instead: a bare 'backends' is a second copy of every backend")

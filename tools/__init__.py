"""The command line, one thin file per command, installed as `graphopt.tools`."""

if __name__ != "graphopt.tools":
    raise ImportError(f"import graphopt.tools, not {__name__}: a second copy of every command would be made")

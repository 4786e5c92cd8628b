"""The commands of ``python -m invfunc``, one a file: its docstring is its help, `add_arguments` what it takes."""

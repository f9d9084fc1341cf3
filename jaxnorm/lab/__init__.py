"""The experiments of the command line: options -> data -> model -> train -> report and plots. Extra `lab`."""

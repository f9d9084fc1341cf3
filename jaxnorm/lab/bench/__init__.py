"""`jaxnorm bench`: options -> peers -> timing, tiny and resnet -> report and plots. Extra `lab`."""

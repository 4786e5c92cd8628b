"""How a pipeline runs so that its activations are freed and rebuilt: one file for each way torch can be running."""

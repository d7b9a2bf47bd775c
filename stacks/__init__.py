"""ZenML stacks as files, in the form of `zenml stack export`, and the code that puts one to use."""

"""What a user touches: configuration, the vLLM plug-in, the command line, the demo."""

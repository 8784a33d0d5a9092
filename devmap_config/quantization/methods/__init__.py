"""One method of quantization a file, found by being here: its `METHOD` says all that is known of it."""

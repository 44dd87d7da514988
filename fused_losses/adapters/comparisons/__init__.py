"""One module per framework, with ``comparisons()``: each slot, run as the framework runs it, beside ours."""

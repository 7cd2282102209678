"""One run, from config to score: build, record, resume. Not here: how to step (`engine`)."""

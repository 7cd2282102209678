"""Many runs from one command: plan, study, loop, executors. Not here: one run (`experiment`)."""

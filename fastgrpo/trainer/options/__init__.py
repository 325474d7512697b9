"""What the user asks for, checked before torch is imported: options, jobs, files, the folder of the run."""

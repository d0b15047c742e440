"""Pages to look at runs, evaluations and studies, and to chat with adapters side by side. They read the files and nothing else."""

"""Pages for people: what a job made and how it went, each one HTML file that needs nothing else."""

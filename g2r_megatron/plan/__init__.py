"""Will a job fit and how long is a step: memory, work and communication of every rank, before the job is queued."""

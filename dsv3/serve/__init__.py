"""The doors a user comes through: batch jobs and chat."""

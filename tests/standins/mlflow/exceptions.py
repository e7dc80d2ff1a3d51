"""mlflow's errors."""


class MlflowException(Exception):
    """Something is not there."""

"""mlflow keeps names here."""

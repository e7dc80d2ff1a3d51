"""Candidates, criteria and surgery. Imports no other room; torch only where it is used."""

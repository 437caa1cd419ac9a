"""The mathematics and contracts that every stage, notebook and benchmark shares."""

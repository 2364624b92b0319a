"""Datasets: upload, check, preview, download. It knows no model and no job."""

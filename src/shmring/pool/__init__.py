"""Process pool with the interface of concurrent.futures; joblib and Dask."""

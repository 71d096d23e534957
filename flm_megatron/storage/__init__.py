"""Object storage by URL (s3://, gs://, az://, and whatever fsspec opens): names, requests that are tried again, caches.

Nothing here is imported, and no library of a store, until a run names a URL.
"""

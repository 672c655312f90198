"""Which store serves which protocol."""

from __future__ import annotations

from dist_asgd.checkpoint.storage.azure import AzureUploads, azure_options, prepare_azure
from dist_asgd.checkpoint.storage.connection import Connection
from dist_asgd.checkpoint.storage.gcs import GcsUploads, gcs_options, prepare_gcs
from dist_asgd.checkpoint.storage.posix import LocalStore
from dist_asgd.checkpoint.storage.remote import RemoteStore
from dist_asgd.checkpoint.storage.rename import MemoryUploads, RenamedUploads, rename_new, rename_new_by_sftp
from dist_asgd.checkpoint.storage.retry import Requests
from dist_asgd.checkpoint.storage.s3 import S3Uploads, prepare_s3, s3_options
from dist_asgd.checkpoint.storage.store import Store
from dist_asgd.checkpoint.storage.url import AZURE, Target

GCS = {"gs", "gcs"}
S3 = {"s3", "s3a"}
SFTP = {"sftp", "ssh"}


def store_of(target: Target) -> Store:
    """StorageError where the protocol or its driver is missing."""
    if target.protocol == "file":
        return LocalStore(target.full, Requests(target.url))
    if target.protocol in S3:
        connection = Connection(target, s3_options(target.options), prepare_s3)
        return RemoteStore(connection, S3Uploads(connection))
    if target.protocol in AZURE:
        connection = Connection(target, azure_options(target.options), prepare_azure)
        return RemoteStore(connection, AzureUploads(connection))
    if target.protocol in GCS:
        connection = Connection(target, gcs_options(target.options), prepare_gcs)
        return RemoteStore(connection, GcsUploads(connection))
    connection = Connection(target, target.options)
    if target.protocol == "memory":
        return RemoteStore(connection, MemoryUploads(connection))
    if target.protocol in SFTP:
        return RemoteStore(connection, RenamedUploads(connection, rename_new_by_sftp, pipelined=True))
    return RemoteStore(connection, RenamedUploads(connection, rename_new))

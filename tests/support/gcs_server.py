"""gcp-storage-emulator as a server of its own: python gcs_server.py PORT BUCKET.

It lacks one thing, which is added here as Google documents it: an upload with ifGenerationMatch=0 is refused with 412
where the object exists.
"""

import sys
import threading
from http import HTTPStatus

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

LOCK = threading.Lock()
INSERT = objects.insert


def exists(storage, bucket, name):
    try:
        storage.get_file_obj(bucket, name)
    except NotFound:
        return False
    return True


def insert(request, response, storage, *args, **kwargs):
    with LOCK:
        conditional = request.query.get("ifGenerationMatch") == ["0"]
        if conditional and exists(storage, request.params["bucket_name"], request.data["meta"]["name"]):
            response.status = HTTPStatus.PRECONDITION_FAILED
        else:
            INSERT(request, response, storage, *args, **kwargs)


objects.insert = insert
from gcp_storage_emulator.server import create_server  # noqa: E402 it takes the handlers when it is imported

if __name__ == "__main__":
    create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket=sys.argv[2]).run()

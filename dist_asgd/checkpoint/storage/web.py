"""Reads files from web servers, by the links of the pages that these show for folders. Nothing can be saved there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_asgd.checkpoint.storage.backend import Backend
from dist_asgd.checkpoint.storage.remote import Info, infos_in
from dist_asgd.checkpoint.storage.rename import RenamedStore
from dist_asgd.checkpoint.storage.retry import TIMEOUT


def web_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options for fsspec's driver, with timeouts for aiohttp unless the user has set them."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
    return {**options, "client_kwargs": {"timeout": timeout, **options.get("client_kwargs", {})}}


class WebStore(RenamedStore):
    """Reads files from a web server."""

    backend = Backend(protocols=("http", "https"), options=web_options)

    def infos(self, path: str, deep: bool) -> list[Info]:
        """Lists the links of a folder's page.

        Raises OSError where the URL itself has no page with links: nobody can tell that from a page that is hidden.
        """
        whole = self._connection.full_path(path)
        try:
            found = infos_in(self._connection.call("ls", f"{whole}/", detail=True), whole)
        except FileNotFoundError as error:
            if path:
                return []
            raise OSError("the server has no such page") from error
        if not found and not path:
            raise OSError("the server shows no page with links to files")
        below: list[Info] = []
        for info in found:
            if info["type"] == "directory" and deep:
                below += self.infos(self._connection.relative_path(info["name"].rstrip("/")), deep)
            elif info["type"] != "directory":
                info["size"] = self._connection.call("info", info["name"])["size"]  # pages have no sizes
        return found + below

"""Buckets as users name them: opened, looked at before anything is mounted, and what is wrong with one said in a line.

Only here do commands import obstore, and only for a bucket. It mounts nothing.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING, Any

from coordlfs.errors import UserError
from coordlfs.sources.address import Address, Options

if TYPE_CHECKING:
    from coordlfs.sources.objects.source import ObjectSource

_PATIENCE = 5.0  # seconds after which a bucket that does not answer is not asked again
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, give the machine a role,"
    " or say --source-option anonymous=true",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, give the machine a role, or say --source-option anonymous=true",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or give the machine a role",
}


def opened(address: Address, options: Options, **how: Any) -> ObjectSource:
    """The bucket, of which nothing is asked yet; `how` is for `ObjectSource`. Raises UserError."""
    logging.getLogger("coordlfs").addHandler(logging.NullHandler())  # a command says itself what failed
    try:
        from coordlfs.sources.objects.source import ObjectSource
    except ModuleNotFoundError as e:
        raise UserError(f"{address} needs {e.name}, which is not installed: pip install 'coordlfs[objects]'") from None
    if options.endpoint is not None and options.endpoint.lower().startswith("http:") and not options.allow_http:
        raise UserError(
            f"{options.endpoint} is plain http, whose data all on the way can read: use https, or say"
            " --source-option allow-http=true"
        )
    try:
        return ObjectSource(address, options, **how)
    except Exception as e:  # what obstore raises for what it does not take is of many kinds
        why = str(e).partition("\n")[0][:200]
        raise UserError(f"{address} cannot be opened: {why}: {_CREDENTIALS[address.scheme]}") from None


def check(address: Address, options: Options) -> None:
    """That a bucket can be listed, and that there is something below its prefix. Raises UserError."""
    source = opened(address, options, tried_for=_PATIENCE)
    try:
        is_empty = source.is_empty()
    except OSError as e:
        raise _explained(address, options, e) from None
    if is_empty:
        raise _nothing_there(source, address)


def _nothing_there(source: ObjectSource, address: Address) -> UserError:
    if not address.prefix:
        return UserError(f"{address} is empty, or its endpoint is no object store: check both")
    try:
        etag = source.store.head(address.prefix).etag
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.EACCES):
            return UserError(f"{address} holds nothing: no key begins with '{address.prefix}/'")
        etag = ""
    if not etag:  # which every store gives, and a web server that has a page for everything does not
        return UserError(f"{address} holds nothing, or its endpoint is no object store: check both")
    return UserError(f"{address} is an object: give the prefix that holds the dataset")


def _explained(address: Address, options: Options, error: OSError) -> UserError:
    """What a user can do about a bucket that cannot be listed."""
    from coordlfs.sources.objects.failures import Meaning
    from coordlfs.sources.objects.store import StoreError

    meaning, why = error.failure if isinstance(error, StoreError) else (Meaning.LASTING, error.strerror)
    where = options.endpoint or "the endpoint of the environment, or the cloud's own"
    if meaning is Meaning.NO_BUCKET:
        return UserError(f"{address.scheme}://{address.bucket} does not exist at {where}: check its name")
    if meaning is Meaning.CREDENTIALS:
        return UserError(f"no credentials were found for {address} ({why}): {_CREDENTIALS[address.scheme]}")
    if meaning is Meaning.DENIED:
        return UserError(f"{address} may not be listed with these credentials ({why}): {_CREDENTIALS[address.scheme]}")
    if meaning is Meaning.REGION:
        return UserError(f"{address} is in another region ({why}): say --source-option region=…")
    if meaning is Meaning.GONE:
        return UserError(f"{where} has no {address} ({why}): check the endpoint and the bucket's name")
    if meaning is Meaning.PASSING:
        return UserError(f"{address} does not answer at {where} ({why}): check the address and the network")
    if meaning is Meaning.BAD_KEY:
        return UserError(f"{address} cannot be listed: {why}, or mount what lies beside it")
    return UserError(f"{address} cannot be listed at {where}: {why}")

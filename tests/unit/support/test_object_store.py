"""The S3 server of the tests: boto3 and s3fs, which know nothing of it, meet the faults that are put in."""

from __future__ import annotations

from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, ConnectionClosedError, ReadTimeoutError

from tests.support.object_store import ObjectStore


@pytest.fixture
def client(object_store: ObjectStore) -> Any:
    """As a user has it: from the environment; tries once, and waits for half a second."""
    return boto3.client("s3", config=Config(retries={"total_max_attempts": 1}, read_timeout=0.5))


def test_it_holds_what_s3fs_writes(object_store: ObjectStore) -> None:
    import s3fs

    files = s3fs.S3FileSystem()
    with files.open(object_store.url("folder/big"), "wb", block_size=5 * 2**20) as stream:
        for _ in range(2):
            stream.write(b"x" * (5 * 2**20))
    files.pipe_file(object_store.url("small"), b"one")
    assert object_store.get("folder/big") == b"x" * (10 * 2**20)
    assert object_store.all_keys() == ["folder/big", "small"] and object_store.open_uploads() == []
    assert object_store.count("part") == 2 and object_store.count("complete", "^folder/") == 1
    assert files.cat_file(object_store.url("small")) == b"one"


def test_conditional_puts_are_kept(object_store: ObjectStore, client: Any) -> None:
    client.put_object(Bucket=object_store.bucket, Key="marker", Body=b"1", IfNoneMatch="*")
    with pytest.raises(ClientError, match="PreconditionFailed"):
        client.put_object(Bucket=object_store.bucket, Key="marker", Body=b"2", IfNoneMatch="*")
    assert object_store.get("marker") == b"1"


def test_the_nth_request_fails(object_store: ObjectStore, client: Any) -> None:
    object_store.put("a", b"12345")
    fault = object_store.fail("GET", "^a$", status=500, after=1, times=2)
    get = lambda: client.get_object(Bucket=object_store.bucket, Key="a")["Body"].read()  # noqa: E731
    assert get() == b"12345"
    for _ in range(2):
        with pytest.raises(ClientError, match="InternalError"):
            get()
    assert get() == b"12345" and fault.met == 2
    with pytest.raises(KeyError):
        object_store.get("b")


def test_a_body_ends_early_and_connections_close(object_store: ObjectStore, client: Any) -> None:
    object_store.put("a", b"x" * 1000)
    object_store.truncate("a", 100)
    with pytest.raises((BotoCoreError, OSError)) as failure:
        client.get_object(Bucket=object_store.bucket, Key="a")["Body"].read()
    assert not isinstance(failure.value, ReadTimeoutError)
    object_store.drop("PUT", "b")
    object_store.drop("PUT", "c", when="after")
    for key in "bc":
        with pytest.raises(ConnectionClosedError):
            client.put_object(Bucket=object_store.bucket, Key=key, Body=b"2")
    assert object_store.all_keys() == ["a", "c"]


def test_answers_late_or_never(object_store: ObjectStore, client: Any) -> None:
    object_store.put("a", b"1")
    object_store.hang("GET", "a", times=1)
    object_store.slow("GET", "a", delay_s=0.6, times=1)
    for _ in range(2):
        with pytest.raises(ReadTimeoutError):
            client.get_object(Bucket=object_store.bucket, Key="a")
    assert client.get_object(Bucket=object_store.bucket, Key="a")["Body"].read() == b"1"


def test_lists_are_of_an_earlier_moment(object_store: ObjectStore, client: Any) -> None:
    def listed() -> list[str]:
        found = client.list_objects_v2(Bucket=object_store.bucket, Prefix="x/")
        return [one["Key"] for one in found.get("Contents", [])]

    object_store.put("x/old", b"1")
    object_store.stale_lists()
    object_store.put("x/new", b"2")
    client.delete_object(Bucket=object_store.bucket, Key="x/old")
    assert listed() == ["x/old"] and object_store.all_keys() == ["x/new"]
    assert client.get_object(Bucket=object_store.bucket, Key="x/new")["Body"].read() == b"2"
    object_store.fresh_lists()
    assert listed() == ["x/new"]

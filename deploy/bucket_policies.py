"""Prints what each service may do in the bucket that holds the artifacts, as policies of AWS IAM:
`python -m deploy.bucket_policies s3://bucket/prefix [--partition aws]`.

One JSON object, a policy by service; a service that touches no artifact has none. Other stores speak other words for
the same table: deploy/local/table.py says who reads and writes in which room.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from deploy.local.table import SERVICES, Service

_URL = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(?P<prefix>[A-Za-z0-9._/=@+-]*?))?/?")
_READING = ["s3:GetObject"]
_WRITING = ["s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.bucket_policies", description=__doc__)
    parser.add_argument("url", help="as FINEMESH_ARTIFACTS_URL: s3://bucket or s3://bucket/prefix")
    parser.add_argument("--partition", default="aws", help="of the bucket: aws, aws-cn, aws-us-gov")
    given = parser.parse_args(arguments)
    match = _URL.fullmatch(given.url)
    if match is None:
        parser.error(f"the address must look like s3://bucket or s3://bucket/prefix, and is {given.url!r}")
    bucket = f"arn:{given.partition}:s3:::{match['bucket']}"
    policies = {service.name: policy(service, bucket, match["prefix"] or "") for service in SERVICES if rooms(service)}
    print(json.dumps(policies, indent=2))
    return 0


def rooms(service: Service) -> tuple[str, ...]:
    return (*service.reads, *service.writes)


def policy(service: Service, bucket: str, prefix: str) -> dict[str, Any]:
    """`bucket` is its ARN."""

    def objects(names: tuple[str, ...]) -> list[str]:
        return [f"{bucket}/{'/'.join(part for part in (prefix, name) if part)}/*" for name in names]

    # Names are ids. Who may not list is told 403 of an object that is gone, so that a torn checkpoint could not be told
    # from a store that is away; and a condition on the prefix of a list does not hold for the reading of an object.
    statements = [_allow("List", ["s3:ListBucket"], [bucket]), _allow("Read", _READING, objects(rooms(service)))]
    if service.writes:
        statements.append(_allow("Write", _WRITING, objects(service.writes)))
    return {"Version": "2012-10-17", "Statement": statements}


def _allow(name: str, actions: list[str], resources: list[str]) -> dict[str, Any]:
    return {"Sid": name, "Effect": "Allow", "Action": actions, "Resource": resources}


if __name__ == "__main__":
    sys.exit(main())

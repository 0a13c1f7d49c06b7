"""A handler under the idempotency decorator: reads the number of its first message, handles as many as asked, says so."""

import sys
import uuid

import redis
from aws_lambda_powertools.utilities.idempotency import IdempotencyConfig, idempotent_function
from aws_lambda_powertools.utilities.idempotency.persistence.redis import RedisCachePersistenceLayer

port, messages = int(sys.argv[1]), int(sys.argv[2])
client = redis.Redis(host="127.0.0.1", port=port, decode_responses=True)
layer = RedisCachePersistenceLayer(client=client)
config = IdempotencyConfig(event_key_jmespath="id", expires_after_seconds=7 * 24 * 3600)


@idempotent_function(data_keyword_argument="message", persistence_store=layer, config=config)
def handle(message):
    client.set(message["state"], "0123456789abcdef")
    return {"answer": "0123456789abcdef0123456789abcdef"}


print("ready", flush=True)
for line in sys.stdin:
    first = int(line)
    batch = [
        {"id": f"{first + number}-{uuid.uuid4().hex}", "state": uuid.uuid4().hex, "text": "x" * 200}
        for number in range(messages)
    ]
    for message in batch:
        handle(message=message)
    print("done", flush=True)

"""A Grid that runs the ClientApp in this process: a strategy's rounds without Ray, SuperLink or sockets."""

from __future__ import annotations

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


class LoopbackGrid(Grid):
    """One persistent Context a node; ``tamper(reply, node_config, round)`` may break a reply or drop it."""

    def __init__(self, app, clients, run_config, tamper=None, first_node=100):
        self.app, self.tamper = app, tamper
        self.contexts = {
            first_node + i: Context(
                1, first_node + i, {"partition-id": i, "num-partitions": clients}, RecordDict(), dict(run_config)
            )
            for i in range(clients)
        }
        self.messages = []

    def set_run(self, run): ...

    @property
    def run(self):
        return Run.create_empty(1)

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self):
        return list(self.contexts)

    def get_nodes(self):
        return []

    def push_messages(self, messages):
        raise AssertionError("strategies here use send_and_receive")

    def pull_messages(self, message_ids):
        raise AssertionError("strategies here use send_and_receive")

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for message in list(messages):
            message.metadata.__dict__["_message_id"] = message.object_id
            self.messages.append(message)
            context = self.contexts[message.metadata.dst_node_id]
            try:
                reply = self.app(message=message, context=context)
            except Exception as error:
                reply = Message(Error(2, repr(error)), reply_to=message)
            if self.tamper is not None:
                reply = self.tamper(reply, message, context)
            replies += reply if isinstance(reply, list) else [] if reply is None else [reply]
        return replies

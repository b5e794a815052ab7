"""The internal port, as its clients see it: method names and channel options of engines and the supervisor.

/phalanx.v1.EngineLink/Connect     both ways: frames of phalanx/runtime/frames.py; the first is Hello
/phalanx.v1.EngineLink/Supervise   both ways: frames of phalanx/deploy/server/supervise.py; the first is SupervisorHello
"""

from phalanx.runtime.frames import MAX_FRAME_BYTES

SERVICE = "phalanx.v1.EngineLink"
ENGINE_METHOD = f"/{SERVICE}/Connect"
SUPERVISE_METHOD = f"/{SERVICE}/Supervise"

# Without `ping_timeout_ms` a frozen peer is noticed after a minute instead of after `keepalive_timeout_ms`.
KEEPALIVE_OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
)
LINK_OPTIONS = (
    *KEEPALIVE_OPTIONS,
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
    ("grpc.max_send_message_length", MAX_FRAME_BYTES),
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)

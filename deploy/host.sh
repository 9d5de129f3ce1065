# Read by ~/.bashrc on every machine of a cluster (cluster.yaml, deploy/aws.yaml); all processes of Ray inherit it.
export PATH="$HOME/.shadecast-venv/bin:$PATH"
# One mode for all machines: with different modes, the head refuses its workers. The token is ~/.ray/auth_token.
export RAY_AUTH_MODE=token
# Serve's proxies refuse headers that they could not carry (docs/protocol.md).
export RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve_app.http_guard:proxy_middlewares

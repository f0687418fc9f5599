# One image for every service of docker-compose.yml: the checkout, set up as `make setup` does it.
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS machine
# Certificates of a network with an authority of its own; usually none.
COPY config/certificates/ /usr/local/share/ca-certificates/
RUN apt-get update \
 && mkdir -p /usr/share/man/man1 \
 && apt-get install -y --no-install-recommends ca-certificates openjdk-17-jre-headless python3 python3-venv \
 && update-ca-certificates \
 && apt-get clean && rm -rf /var/lib/apt/lists/*
ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt PIP_DEFAULT_TIMEOUT=180
WORKDIR /opt/meterstream

# All that changes seldom: a change of code alone builds none of it again.
FROM machine AS packages
COPY pyproject.toml requirements.lock ./
COPY config/ivy.xml config/
COPY tools/setup.py tools/
RUN mkdir -p schemas metering/energy metering/voltage metering/alarms metering/sharing metering/validation kafka_io mqtt_io lake engine ingest streaming_jobs batch_jobs \
    replay/dirt replay/fleet replay/importers replay/run replay/simulate replay/verify stack && touch README.md settings.py \
 && python3 tools/setup.py && rm -rf /root/.cache .venv/jars/ivy .venv/tmp

FROM machine AS meterstream
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /data meterstream \
 && mkdir /data && chown meterstream:meterstream /data
COPY --from=packages /opt/meterstream/.venv .venv
COPY . .
RUN find . -path ./.venv -prune -o -exec chmod a+rX {} +
ENV PATH=/opt/meterstream/.venv/bin:$PATH PYTHONPATH=/opt/meterstream METERSTREAM_HOME=/data METERSTREAM_LISTEN=0.0.0.0 PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
USER meterstream
WORKDIR /data
ENTRYPOINT ["python", "-m"]
CMD ["stack", "--help"]

# The same with an S3 server in it: docker-compose.yml names the stage that it wants, and none after it is built.
FROM packages AS s3-server
RUN python3 tools/setup.py s3

FROM meterstream AS s3
COPY --from=s3-server /opt/meterstream/.venv/bin/versitygw /opt/meterstream/.venv/bin/

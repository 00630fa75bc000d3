"""NetBox's settings in the build stage: a throw-away database, and secrets of nobody."""

import os

ALLOWED_HOSTS = ["*"]
SECRET_KEY = "of-the-build-stage-only-" + "0" * 50
API_TOKEN_PEPPERS = {1: "of-the-build-stage-only-" + "0" * 50}
DATABASES = {
    "default": {
        "NAME": os.environ.get("BUILD_DATABASE", "netbox"),
        "USER": "netbox",
        "HOST": "/var/tmp/netbox-build",
        "PORT": 5432,
        "CONN_MAX_AGE": 0,
    }
}
_REDIS = {"HOST": "127.0.0.1", "PORT": 6379, "USERNAME": "", "PASSWORD": "", "SSL": False}
REDIS = {"tasks": {**_REDIS, "DATABASE": 0}, "caching": {**_REDIS, "DATABASE": 1}}
ISOLATED_DEPLOYMENT = True
CENSUS_REPORTING_ENABLED = False
RELEASE_CHECK_URL = None

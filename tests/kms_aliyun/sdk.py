"""Makes the official SDK of Alibaba Cloud call the simulation in tests/common/aliyun.rs.

    sdk.py record PORT                         sends five requests with fixed variable parts, through PORT as a proxy
    sdk.py use PORT KEY ROLE ID SECRET         assumes the role, creates and decrypts a key, prints the results as JSON
    sdk.py decrypt PORT ROLE ID SECRET BLOB CONTEXT   decrypts a key that the engine's backend wrapped
"""

import json
import sys

from alibabacloud_kms20160120 import models as kms_models
from alibabacloud_kms20160120.client import Client as Kms
from alibabacloud_sts20150401 import models as sts_models
from alibabacloud_sts20150401.client import Client as Sts
from alibabacloud_tea_openapi.utils import Utils
from alibabacloud_tea_openapi.utils_models import Config

CONTEXT = {
    "envelog:key-version": "1",
    "envelog:logstore": "00112233445566778899aabbccddeeff",
    "envelog:store": "ffeeddccbbaa99887766554433221100",
    "envelog:suite": "AES-256-GCM *~ é",
}


def client(kind, port, key, proxied):
    where = {"endpoint": f"127.0.0.1:{port}"}
    if proxied:
        name = "sts" if kind is Sts else "kms"
        where = {"endpoint": f"{name}.cn-hangzhou.aliyuncs.com", "http_proxy": f"http://127.0.0.1:{port}"}
    names = dict(zip(("access_key_id", "access_key_secret", "security_token"), key))
    return kind(Config(protocol="http", region_id="cn-hangzhou", **where, **names))


def assume_role(port, role, key, proxied=False):
    request = sts_models.AssumeRoleRequest(role_arn=role, role_session_name="envelog", duration_seconds=900)
    given = client(Sts, port, key, proxied).assume_role(request).body.credentials
    return given.access_key_id, given.access_key_secret, given.security_token


def record(port):
    Utils.get_nonce = staticmethod(lambda: "0123456789abcdef0123456789abcdef")
    Utils.get_timestamp = staticmethod(lambda: "2026-01-31T12:00:00Z")
    Utils.get_user_agent = staticmethod(lambda *_: "sdk")
    assume_role(port, "acs:ram::13234:role/logsource", ("LTAI-service", "secret-of-the-service"), proxied=True)
    kms = client(Kms, port, ("STS.fixed", "secret-of-the-session", "token+of/the=session=="), proxied=True)
    requests = [
        (kms.generate_data_key, kms_models.GenerateDataKeyRequest(key_id="key-hzz00000001", key_spec="AES_256", encryption_context=CONTEXT)),
        (kms.decrypt, kms_models.DecryptRequest(ciphertext_blob="a+b/c==", encryption_context=CONTEXT)),
        (kms.describe_key, kms_models.DescribeKeyRequest(key_id="key-hzz00000001")),
        (kms.encrypt, kms_models.EncryptRequest(key_id="key-hzz00000001", plaintext="cGxhaW4=", encryption_context={})),
    ]
    for call, request in requests:
        try:
            call(request)
        except Exception as error:
            # The ciphertext is invalid, and the simulation has no Encrypt. A rejected signature gives another error.
            assert getattr(error, "code", None) in ("InvalidParameter", "InvalidAction.NotFound"), repr(error)


def use(port, key, role, *login):
    kms = client(Kms, port, assume_role(port, role, login), False)
    made = kms.generate_data_key(
        kms_models.GenerateDataKeyRequest(key_id=key, key_spec="AES_256", encryption_context=CONTEXT)
    ).body
    request = kms_models.DecryptRequest(ciphertext_blob=made.ciphertext_blob, encryption_context=CONTEXT)
    back = kms.decrypt(request).body
    state = kms.describe_key(kms_models.DescribeKeyRequest(key_id=key)).body.key_metadata.key_state
    print(json.dumps({"same": made.plaintext == back.plaintext, "key": back.key_id, "state": state}))


def decrypt(port, role, id, secret, blob, context):
    kms = client(Kms, port, assume_role(port, role, (id, secret)), False)
    request = kms_models.DecryptRequest(ciphertext_blob=blob, encryption_context=json.loads(context))
    try:
        print(json.dumps({"key": kms.decrypt(request).body.key_id}))
    except Exception as error:
        print(json.dumps({"code": getattr(error, "code", repr(error))}))


{"record": record, "use": use, "decrypt": decrypt}[sys.argv[1]](*sys.argv[2:])

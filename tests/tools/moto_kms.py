#!/usr/bin/env python3
"""moto's AWS server, with KMS key states enforced as AWS documents them.

    moto_kms.py --port 5055        (python packages: moto-requirements.txt in this directory)

Unmodified moto lets a key that is disabled or pending deletion encrypt and decrypt. AWS answers DisabledException for a disabled
key and KMSInvalidStateException for one that is pending deletion (AWS KMS developer guide, "Key states of
AWS KMS keys"; API reference of Decrypt, Encrypt, GenerateDataKey, ReEncrypt). Everything else is unmodified moto.
"""
import argparse

from moto.core.exceptions import JsonRESTError
from moto.kms import models
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple


class KeyStateError(JsonRESTError):
    code = 400


def check(key):
    if key.key_state == "Disabled":
        raise KeyStateError("DisabledException", f"{key.arn} is disabled.")
    if key.key_state != "Enabled":
        raise KeyStateError("KMSInvalidStateException", f"{key.arn} is pending deletion.")


real_encrypt, real_decrypt = models.encrypt, models.decrypt


def find(master_keys, key_id):
    return next((k for i, k in master_keys.items() if key_id in (i, k.arn)), None)


def encrypt(master_keys, key_id, plaintext, encryption_context):
    if key := find(master_keys, key_id):
        check(key)
    return real_encrypt(master_keys, key_id, plaintext, encryption_context)


def decrypt(master_keys, ciphertext_blob, encryption_context):
    plaintext, key_id = real_decrypt(master_keys, ciphertext_blob, encryption_context)
    check(find(master_keys, key_id))
    return plaintext, key_id


models.encrypt, models.decrypt = encrypt, decrypt

if __name__ == "__main__":
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--port", type=int, required=True)
    port = args.parse_args().port
    run_simple("127.0.0.1", port, DomainDispatcherApplication(create_backend_app), threaded=True)

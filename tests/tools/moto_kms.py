#!/usr/bin/env python3
"""moto's AWS server, which refuses as AWS documents it.

    moto_kms.py --port 5055        (python packages: moto-requirements.txt in this directory)

Four things differ from unmodified moto (AWS KMS developer guide, "Key states of AWS KMS keys" and "Key policies in AWS KMS";
API reference of Decrypt and Encrypt):

- A disabled key gives DisabledException, and a key pending deletion KMSInvalidStateException. moto lets both keys encrypt and
  decrypt.
- A key whose policy has a statement with the effect Deny gives AccessDeniedException. moto enforces no key policy. The tests
  have one role, so this looks neither at the principal nor at the action.
- A KeyId that is not the key of the ciphertext gives IncorrectKeyException, and a ciphertext of no key InvalidCiphertextException.
  moto gives AccessDeniedException for both.
- The encryption context is bound entry by entry. moto binds the names and values as one text.

Everything else is unmodified moto.
"""
import argparse
import json

from moto.core.exceptions import JsonRESTError
from moto.kms import exceptions, models, utils
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple


class KeyStateError(JsonRESTError):
    code = 400


def denies(key):
    statements = json.loads(key.policy).get("Statement", [])
    return any(statement.get("Effect") == "Deny" for statement in statements)


def check(key):
    if denies(key):
        raise KeyStateError("AccessDeniedException", f"The policy of {key.arn} has an explicit deny.")
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
    try:
        plaintext, key_id = real_decrypt(master_keys, ciphertext_blob, encryption_context)
    except exceptions.AccessDeniedException:
        raise exceptions.InvalidCiphertextException()
    check(find(master_keys, key_id))
    return plaintext, key_id


def backend_decrypt(self, ciphertext_blob, encryption_context, key_id=None):
    named = None if key_id is None else self.keys[self.any_id_to_key_id(key_id)]
    if named is not None:
        check(named)
    plaintext, arn = real_backend_decrypt(self, ciphertext_blob, encryption_context)
    if named is not None and named.arn != arn:
        raise KeyStateError("IncorrectKeyException", "The key ID in the request does not identify a key that can decrypt this.")
    return plaintext, arn


def serialize_encryption_context(encryption_context):
    return json.dumps(encryption_context, sort_keys=True).encode()


models.encrypt, models.decrypt = encrypt, decrypt
real_backend_decrypt, models.KmsBackend.decrypt = models.KmsBackend.decrypt, backend_decrypt
utils._serialize_encryption_context = serialize_encryption_context

if __name__ == "__main__":
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--port", type=int, required=True)
    port = args.parse_args().port
    run_simple("127.0.0.1", port, DomainDispatcherApplication(create_backend_app), threaded=True)

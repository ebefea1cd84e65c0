//! The axum example, by its routes.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use axum::{
    Router,
    body::{Body, Bytes},
    http::{Request, Response, StatusCode},
};
use envelog::{Cmk, EncryptConf, EncryptType, LogstoreSpec, Store, crypto::AwsLc, kms::LocalKms};
use envelog_examples::web::router;
use http_body_util::BodyExt;
use tempfile::TempDir;
use tower::ServiceExt;

struct World {
    store: Store,
    kms: Arc<LocalKms>,
    cmk: Cmk,
    service: Router,
    _dir: TempDir,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let kms = Arc::new(LocalKms::create_or_open(dir.path().join("kms")).unwrap());
        let key = kms.create_key("eu", &["role"]).unwrap();
        let store =
            Store::builder(dir.path().join("store"), dir.path().join("keyring"), AwsLc::new())
                .kms(Arc::clone(&kms) as _)
                .create()
                .unwrap();
        let cmk = Cmk { cmk_key_id: key, arn: "role".to_owned(), region_id: "eu".to_owned() };
        let byok = EncryptConf::byok(EncryptType::Aes, cmk.clone());
        for (name, conf) in
            [("app/byok", byok), ("app/plain", EncryptConf::service_key(EncryptType::Aes))]
        {
            store
                .create_logstore(&name.parse().unwrap(), LogstoreSpec::default().encrypt_conf(conf))
                .unwrap();
        }
        Self { service: router(store.clone()), store, kms, cmk, _dir: dir }
    }

    async fn call(&self, method: &str, path: &str, body: &str) -> Response<Body> {
        let request = Request::builder().method(method).uri(path);
        let request = request.body(Body::from(body.to_owned())).unwrap();
        self.service.clone().oneshot(request).await.unwrap()
    }
}

async fn text(response: Response<Body>) -> String {
    String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
}

#[tokio::test]
async fn lines_are_appended_and_streamed() {
    let world = World::new();
    let appended = world.call("POST", "/app/byok", "one\ntwo\n").await;
    assert_eq!(appended.status(), StatusCode::OK);
    assert_eq!(text(appended).await, r#"{"seq":0,"shard":0}"#);
    let mut stream = world.call("GET", "/app/byok?from=0", "").await.into_body().into_data_stream();
    let mut next =
        async || -> Bytes { futures_util::StreamExt::next(&mut stream).await.unwrap().unwrap() };
    assert_eq!(next().await, "one\ntwo\n");
    // The stream goes on with what comes later.
    let later = tokio::join!(next(), world.call("POST", "/app/byok", "three"));
    assert_eq!(later.0, "three\n");
}

#[tokio::test]
async fn a_status_says_who_has_to_act() {
    let world = World::new();
    for (path, status, code) in [
        ("/app/absent", StatusCode::NOT_FOUND, "logstore_missing"),
        ("/app/b%20d", StatusCode::BAD_REQUEST, "name"),
    ] {
        let response = world.call("POST", path, "x").await;
        assert_eq!(response.status(), status);
        let body = text(response).await;
        assert!(body.contains(code), "{body}");
    }
    assert_eq!(world.call("POST", "/app/byok", "x").await.status(), StatusCode::OK);
    world.kms.disable(&world.cmk.cmk_key_id).unwrap();
    world.store.logstore(&"app/byok".parse().unwrap()).unwrap().revalidate_now().unwrap_err();
    let refused = world.call("POST", "/app/byok", "x").await;
    assert_eq!(refused.status(), StatusCode::FORBIDDEN);
    assert!(text(refused).await.contains(r#""code":"revoked""#));
    assert_eq!(world.call("GET", "/app/byok", "").await.status(), StatusCode::FORBIDDEN);
    // The neighbour is undisturbed.
    assert_eq!(world.call("POST", "/app/plain", "x").await.status(), StatusCode::OK);
}
